"""The small models that come with this package: what turns their captions and labels into pictures."""
