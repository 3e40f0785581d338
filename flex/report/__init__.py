"""What came out of a run, for people: a table in the terminal, findings in sentences, one HTML page."""
