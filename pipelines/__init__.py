"""Batch jobs: files in, evaluated policies and reports out."""
