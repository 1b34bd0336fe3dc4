"""What is a model as files?"""
