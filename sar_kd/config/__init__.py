"""What a run is made of: its settings, their checks, and the command line that is built from them.

In: the words of a command line, the values of a Python call, or the `config.json` of a run that is resumed.
Out: a frozen `Config` (or `SftConfig`, `CachingConfig`), each value checked and each error naming its flag.
May import: `errors`, `version`, `embedded`. No torch.
"""
