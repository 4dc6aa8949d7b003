"""Does a learned policy with structural levers beat fixed rules of structure, at equal compute? (see ``__main__``)."""
