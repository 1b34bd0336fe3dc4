"""What happens around one run of a stage: the entry point's work, its processes, its interpreter."""
