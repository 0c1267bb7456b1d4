"""Other people's trainers with this project's update in them, one file a host; importing one brings
the host."""
