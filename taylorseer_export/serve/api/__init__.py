"""The images API: what the OpenAI API defines for images, over HTTP, for bundles that draw."""
