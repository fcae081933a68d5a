"""Words, tables, pictures and pages. No figure is made here."""
