"""The embedded default: PostgreSQL, Qdrant's engine and every service of embedd on one machine, under one supervisor.

For a laptop, a demo and the tests; `cli.py` and the tests are its only users. Each embedded part gives way to a real
one by its environment variable (`EMBEDD_DATABASE_URL`, `EMBEDD_QDRANT_URL`).
"""
