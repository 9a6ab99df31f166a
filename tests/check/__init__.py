"""Tests of the check: exact models, planted faults, strangers' models, the command."""
