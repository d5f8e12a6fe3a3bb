"""A complete world in one file: README.md shows it and tools/readme_tables.py writes it there."""
