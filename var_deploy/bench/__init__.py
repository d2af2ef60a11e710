"""`var-deploy bench`: a bundle beside other ways to compute the same, in one interleaved run."""
