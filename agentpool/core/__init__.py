"""The pure core: decides everything, performs nothing.

No module in here knows a clock, a thread, a file or a process. Events go in with `now`, actions come out.
"""
