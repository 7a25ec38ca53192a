from utilityvm.agent.init import main

main()
