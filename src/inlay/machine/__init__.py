"""What this machine does well, found out once; this room is below all others.

precision.py  the precisions in which a device computes fast and safely, and the choice of one for a base
kept.py       measurements of this machine, kept in the user's cache folder
"""
