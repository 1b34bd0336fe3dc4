"""Which version answers whom?"""
