"""What happens around one run of a stage? The entry point's work, its processes, its interpreter."""
