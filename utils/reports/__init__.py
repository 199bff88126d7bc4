"""Results for people: charts, tables and the HTML report."""
