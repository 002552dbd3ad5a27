"""What the machine underneath does well, found out once: the room below all others.

precision.py  in which precision a device computes fast and safely, and the choice of one for a base
kept.py       what was measured here, in the user's cache folder
"""
