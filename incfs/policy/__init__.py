"""The policy: rules in, plans out.  Pure: no I/O, no clock.

``document`` reads the text, ``effective`` says what holds for one volume, ``retention`` which
snapshots stay, ``planner`` what is to be done now.  ``incfs.enforcer`` carries plans out.
"""
