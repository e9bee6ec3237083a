"""Object detectors: what is in an image, data with boxes, average precision, and pictures of it all."""
