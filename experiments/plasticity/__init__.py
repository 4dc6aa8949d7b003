"""What keeps a network able to learn when its task changes many times? (see ``__main__``)."""
