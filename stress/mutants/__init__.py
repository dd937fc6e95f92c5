"""Mutation testing of `agentpool/core` with the mutants of mutmut: `make mutants`."""
