"""Pages and figures made from report.json, whose fields are in auditing/schema.py, and tables on disk."""
