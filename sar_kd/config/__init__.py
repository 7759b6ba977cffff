"""The settings of a run, their checks, and the command line built from them.

In: a command line, the arguments of a Python call, or the `config.json` of a run to resume.
Out: a frozen `Config` (or `SftConfig`, `CachingConfig`); every value is checked, every error names its option.
May import: `errors`, `version`, `embedded`. No torch.
"""
