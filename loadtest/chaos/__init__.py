"""Faults, one after the other, under a load whose every answer is known beforehand."""
