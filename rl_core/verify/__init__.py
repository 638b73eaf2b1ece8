"""Smallest honest experiments of the methods' pages: arms that are run once, and margins that they must keep."""
