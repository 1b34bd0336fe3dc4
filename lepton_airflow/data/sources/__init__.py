"""What IngestData can read."""
