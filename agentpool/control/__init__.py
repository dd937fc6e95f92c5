"""Operating a pool from another process: a Unix socket per pool, and the client that the command line uses.

`folder` knows where sockets are, `wire` what a line looks like, `server` serves them in the pool's process, `verbs` is
what may be asked there, `client` asks. Nothing here decides anything about tasks or workers, and nothing unpickles:
all that is read from a socket is JSON. The client's side imports the standard library only.
"""
