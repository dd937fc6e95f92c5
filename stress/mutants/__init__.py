"""Mutation testing of `agentpool/core` with mutmut: `make mutants`."""
