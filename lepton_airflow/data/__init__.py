"""Where do rows come from, and what do they look like?"""
