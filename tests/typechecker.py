"""The checker behind the import hook: beartype, with an int accepted where a float is wanted."""

from beartype import BeartypeConf, beartype

tower = beartype(conf=BeartypeConf(is_pep484_tower=True))
