"""`var-deploy bench`: times a bundle against other runtimes, in interleaved rounds."""
