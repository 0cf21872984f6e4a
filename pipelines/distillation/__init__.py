"""The student learns from its teacher: the loop, and what is measured of both before and after it."""
