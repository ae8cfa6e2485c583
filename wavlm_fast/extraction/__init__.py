"""Folders, lists and manifests of audio to files of features."""
