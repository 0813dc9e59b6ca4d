"""What lies between people and latents: requests of prompts and labels, pictures and videos; and what the package's own
small models need for it."""
