"""What puts load on agentpool on purpose. No part of the wheel; in a clone a package, so that `python -m` finds it."""
