"""Reports of many runs: collected from their folders, compared cell by cell, written as text, tables and pictures."""
