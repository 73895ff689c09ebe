"""Run folders: networks on disk, with the record of how they were made."""
