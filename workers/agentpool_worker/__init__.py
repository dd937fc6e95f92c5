"""What runs in a worker process: the standard library and cloudpickle only, ready in milliseconds.

Imports nothing of `agentpool`. A task that wants to know about itself imports `agentpool_worker.context`.
"""
