"""Speed and memory against a written floor; never run by the tests."""
