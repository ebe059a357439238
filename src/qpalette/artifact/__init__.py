"""The stored model: its format, its reader, its writer."""
