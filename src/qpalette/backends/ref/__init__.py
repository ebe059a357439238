"""The living definition: plain torch, any device, no speed."""

from qpalette.backends.ref.backend import ReferenceBackend

backend = ReferenceBackend()
