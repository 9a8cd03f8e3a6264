"""Images and a checkpoint -> what the network says of them, and where its EMA attention looks."""
