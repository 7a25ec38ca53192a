"""The GCS bridge protocol: framing and messages, for both ends. Standard library only: half of it runs in the guest.

`frame` knows bytes, `messages` knows what they mean.
"""
