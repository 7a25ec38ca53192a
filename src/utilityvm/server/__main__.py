from utilityvm.server.run import main

main()
