"""Every arm and seed through all phases, and what follows from them: does the video model help, and why?"""
