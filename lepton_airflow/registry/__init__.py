"""Who is registered, and who is champion?"""
