"""What can IngestData read?"""
