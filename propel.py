"""Propel's front door."""


def main() -> None: ...
