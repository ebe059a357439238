"""Vocabulary shared by every stage: rates, records, errors. Imports nothing of the project, and no torch."""
