"""easyref: several reference images and a prompt in, a new image that keeps what they have in common out."""

__version__ = "0.1.0"
