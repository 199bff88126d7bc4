"""Reading, drawing and writing of images and videos."""
