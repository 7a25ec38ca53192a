"""Files on their way between host and guest: both ends of a copy, in the standard library alone.

The same code runs in the guest's agent and on the host. `send` walks files, folders and links, and gives the bytes of
a *stream*; `receive.Receiver` takes those bytes and makes what they say. In the stream (`records`) there are no paths:
a folder is entered and left, and each name is one component. A receiver believes nothing that it is sent; see there
what it refuses.
"""
